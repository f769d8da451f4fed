"""From tracked runs to tables and figures."""
