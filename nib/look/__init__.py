"""One page that shows what a model does with a text: look.py is the script.

Start with trace.py, which records what happens while the model runs. snapshot.py computes the page's numbers from
that, and page.py writes them into page.html.
"""
