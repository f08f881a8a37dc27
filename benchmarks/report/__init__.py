"""Tables and plots from result files.

    analysis   samples -> cells, comparisons, floors
    cost       prices and where one card becomes cheaper than another
    document   what a report is made of: sections of text, tables and figures
    content    analysis -> document
    plots      analysis -> figures (matplotlib)
    markdown, html, export   document and analysis -> files
    build      the one entry point

Every table says what it is: measured, published, modelled, or derived from those. Measured and
modelled figures never share a column.
"""
