"""What carries: sockets, processes, files and threads around the cores of ``meshinfer``."""
