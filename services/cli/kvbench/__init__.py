"""What moving KV costs, each figure beside what it is compared with in the same run."""
