"""Metrics: each file of this folder that holds some ends in a table of them; `config.choices` reads them all."""
