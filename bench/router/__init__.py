"""How fast the router is, over engines that cost nothing."""
