"""The command `microserve`: a launcher for one machine and a client of the router."""
