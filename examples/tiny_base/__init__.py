"""How the bundled base was made: labelled pictures of random scenes, and pretraining on questions about them.

No command of maps_ray imports this folder. `jobs/render_scenes.py` and `jobs/pretrain_tiny.py` are its commands.
"""
