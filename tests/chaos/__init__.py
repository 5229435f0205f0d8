"""The chaos suite: real daemons in a lab, real faults, a history of each run, judged offline."""
