// Placeholder translation unit, replaced as the folder fills.
