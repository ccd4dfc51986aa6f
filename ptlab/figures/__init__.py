"""The pictures of docs/visual-summary.md, drawn from the small files in docs/data; scripts/make_figures.py is the command."""
