"""Where 0.1.0 had this function: adapters and scripts written for it import it from here."""

from reference.data.prepare import prepare as prepare
