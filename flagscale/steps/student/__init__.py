"""How convert-student and measure-layers make a student."""
