"""Advice: what a machine does today, what it could do, and what to type to get there. Without torch."""

from kitaeru.report.advice.assemble import Advice, advise
from kitaeru.report.advice.facts import Facts, Figure, Today, from_model, from_recipe, from_run, ran_in
from kitaeru.report.advice.page import pages

__all__ = ["Advice", "Facts", "Figure", "Today", "advise", "from_model", "from_recipe", "from_run", "pages", "ran_in"]
