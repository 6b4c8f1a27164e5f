"""One stage's result as numbers, figures, a page and a terminal screen."""
