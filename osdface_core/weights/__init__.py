"""Weight files: which there are, how they are fetched and checked, and how pickled ones are read
without running them.
"""
