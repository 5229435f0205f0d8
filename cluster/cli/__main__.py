"""``python -m cluster.cli`` is ``meshinfer``."""

from cluster.cli import app

app(prog_name="meshinfer")
