"""What a run leaves behind: results.json, the table, pictures, videos and the model card.

Import from the modules directly, for example ``from pi_rl.hub.results import results_table``.
"""
