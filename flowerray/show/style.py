"""The palette."""

INK, GRID = "#222222", "#dddddd"
BLUE, ORANGE, GREEN = (
    "#0072b2",
    "#d55e00",
    "#009e73",
)  # Okabe and Ito: told apart by the colour-blind

GREY = "#6b6b6b"
