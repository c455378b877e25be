// Gives each kernel library one host translation unit, so that it exists before any kernel is added.
