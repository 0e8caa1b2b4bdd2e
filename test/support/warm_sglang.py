# ruff: noqa: E402, F401
"""Imports what the front end of a server needs, before its launcher is forked
(:mod:`support.warm`)."""

import gc
import logging

import crosspool.cli.serve
from crosspool.frontend import compat

compat.install()

import crosspool.frontend.detokenizer
import crosspool.frontend.model_app
import crosspool.server.fork_server
import crosspool.server.http_process
import crosspool.server.scheduler_loop
import sglang.srt.entrypoints.http_server

# SGLang writes log lines somewhere once it is imported; processes say themselves where theirs go.
logging.getLogger().handlers.clear()
logging.getLogger().setLevel(logging.WARNING)
gc.collect()
gc.freeze()  # the collector, writing to every object, would soon have copied all pages
