"""`octavo eval`: what the schemes of the paper's Table 1 cost a model, and what SmoothQuant and peers do.

Of a causal language model the divergence from the model as it is, its likeliest tokens and its perplexity on a text;
of an encoder its embeddings. Each variant sees the same windows, one in each call, so that the columns that are
outlying in one have no part in another; differences are paired window by window.
"""
