"""Does a training reach anything but this machine? It runs where nothing else exists, and each attempt is noted.

`checking` is the story, `confined.py` the program that shuts a command in and watches its system calls,
`hook/sitecustomize.py` what every Python in there loads, for the names that are looked up.
"""
