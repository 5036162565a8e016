"""Worlds that are drawn by code: one grammar of scenes, captions, edits, questions and stories, and sets of sprites.

`emoji` and `shapes` are the sprites; `dataset` writes ordinary data sets, `judge` says what an image shows.
"""
