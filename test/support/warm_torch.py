# ruff: noqa: F401
"""Imports what device processes need, before they are forked (:mod:`support.warm`)."""

import gc

import crosspool.ranks.device_process
import crosspool.ranks.host.load
import crosspool.ranks.resident.load
import crosspool.ranks.weight_holder
import setproctitle
import transformers.modeling_rope_utils
import transformers.models.auto.configuration_auto

# It finds the room for titles now, before processes have environments of their own.
setproctitle.getproctitle()
gc.collect()
gc.freeze()  # the collector, writing to every object, would soon have copied all pages
