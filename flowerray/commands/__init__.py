"""What the commands on data and on finished models do, without the command line: plain data out."""
