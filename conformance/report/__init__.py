"""From results to what people and machines read: the letter, JSON, annotations, Markdown, and pages."""
