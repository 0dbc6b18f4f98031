"""Programs: loading policies, keeping them, and running one for a request."""
