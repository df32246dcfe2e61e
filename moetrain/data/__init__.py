"""Token data: folders of tokens, their mixing and packing, and what fills them. Read ``loader.py`` first.

A tokenized corpus is a folder (``corpus.py``). ``stdlib.py`` builds the default one and ``tokenize.py`` makes one of
any text (``sources.py`` reads it, ``bpe.py`` turns it into tokens). ``loader.py`` answers "which tokens are samples
[first, first + count)" without state. ``bigram.py`` is the loss that any trained model has to beat.
"""
