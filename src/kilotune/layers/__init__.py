"""The wrappers around a model's layers, and how they run: forward, merge, dtype, dropout, routes.

adapted.py is AdaptedLayer, around a layer; adapted_parameters.py and saved_module.py are the other two. route.py says
what a route is, routing.py how a layer runs one; active_adapters.py what runs where, replay.py what ran. Stands on
methods/, kinds/ and storage/; begin in adapted.py.
"""
