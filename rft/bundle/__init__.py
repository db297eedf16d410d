"""One folder that installs rft without a network: wheels, the project, models, data, checksums, and what installs it.

`making` writes it, `install.py` is carried in it and needs nothing but Python. MANIFEST is written last: a folder
without one is not complete.
"""
