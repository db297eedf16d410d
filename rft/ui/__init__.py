"""The page: look at runs in a browser, from their folders alone. `rft ui RUNS_DIR` serves it, and so does `rft serve`.

schema.py is the contract between the routes and the front end in static/. Nothing here trains, and nothing imports the
server: what differs between a folder of runs and a server's jobs is behind runs.py.
"""
