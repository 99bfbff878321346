"""From what a cut costs to what to do: candidates, their order, reasons, pictures, unequal shares."""
