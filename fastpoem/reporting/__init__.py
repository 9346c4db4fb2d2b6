"""What a person looks at after, or while, a run trains: its charts as SVG and PNG, and a page of them."""
