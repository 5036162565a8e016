"""NextFlow behind OpenAI's API, in Ray Serve, and in the engines and harnesses that people run.

`worker` batches requests on one pipeline and knows no HTTP; `protocol` knows OpenAI's requests and no pipeline; `app`
joins the two. `plugins` holds the entry points of engines.
"""
