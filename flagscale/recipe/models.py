"""Section `teacher`."""

from __future__ import annotations

from flagscale.recipe.pretrained import SourceRecipe


class TeacherRecipe(SourceRecipe):
    """Where the teacher comes from and how exact its import must be."""
