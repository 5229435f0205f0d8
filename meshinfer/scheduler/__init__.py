"""The sans-IO cores of coordinator, worker and client: ``handle(event, now) -> effects``.

Each core is changed by its ``handle`` alone. Whatever can fail comes back as an event.
"""
