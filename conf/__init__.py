"""The configuration of ``esper train``, reached by Hydra as ``pkg://esper.conf``."""
