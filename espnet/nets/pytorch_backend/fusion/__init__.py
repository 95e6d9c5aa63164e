"""How the streams become one."""
