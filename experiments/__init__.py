"""Experiments behind the tables of trained models; run from a clone of the repository, they are not installed.

``python -m experiments.learning`` and ``experiments.scenes`` train models by the recipes of :mod:`xformer.recipes`.
``ssdlite`` and ``lraspp`` are torchvision's models as tasks, for comparison. ``shapes`` generates the scenes, and
``python -m experiments.anchors`` computes anchors for a data set.
"""
