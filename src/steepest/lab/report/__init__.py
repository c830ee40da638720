"""One HTML page that needs nothing else: the result of a study, its evidence and its raw summary.

Needs the extra `steepest[report]` (plotly, jinja2). The page carries the summary it was made from,
so `read` gets it back and the page can be rebuilt.
"""

from steepest.lab.report.page import find, read, render, write

__all__ = ["find", "read", "render", "write"]
