"""`octavo analyze`: the outlier features of a model, as the paper's section 4 looks at them.

A feature is an outlier feature where its magnitude is at least 6 in at least 25 % of the layers and at at least 6 % of
the sequence positions. `analysis` tells the story from top to bottom; each chapter is a module of its own.
"""
