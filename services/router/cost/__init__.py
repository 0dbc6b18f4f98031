"""What a placement of a request would cost, from speeds that are measured while the fleet works."""
