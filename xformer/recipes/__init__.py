"""Training, evaluation, prediction and export of the models: the commands of ``python -m xformer``.

A command is a module: ``train``, ``eval``, ``predict`` and ``export``. A task is a file in ``tasks``. ``settings`` has
the settings of a run, and ``configs`` the recipe files.
"""
