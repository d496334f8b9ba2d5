"""The command line, the named recipes and the starting of ranks. Starts without torch, on a login node."""
