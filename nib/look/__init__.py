"""One page that shows what a model does with a text: look.py is the script.

Start with trace.py (what is recorded while the model runs); snapshot.py makes the numbers of the page of it,
page.py writes them into page.html.
"""
