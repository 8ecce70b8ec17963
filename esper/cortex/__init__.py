"""The knowledge: who should do a task, what it will cost, what happened before. For texts and for growth alike."""
