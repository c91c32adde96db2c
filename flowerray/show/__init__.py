"""Everything that draws: style, charts, contact sheets, pages."""
