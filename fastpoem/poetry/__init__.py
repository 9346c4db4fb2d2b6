"""What makes a verse: forms, rhymes and tones of classical Chinese poems, told from the text alone and without torch."""
