"""What a model looks at: recorded attention, carried through networks, drawn and judged."""
