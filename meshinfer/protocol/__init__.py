"""What travels: typed messages and how they become frames. Pure: no socket here."""
