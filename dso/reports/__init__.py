"""The report of a study: one page that opens offline, its plots as PNG, and the study itself as JSON.

    digest      a method's seeds as one row, and where it is ahead of ours
    words       the summary, in sentences
    tables      the rows of the page's tables, as text
    figures     the plots (matplotlib), drawn from a study alone
    drawing     a plot as SVG that stands in a page, and as PNG
    page        the page (jinja2), and the folder that holds it

matplotlib and jinja2 (``dso[train]``) are imported where they are used.
"""
