"""Write the skeleton of an adapter: what an audit of a script found is filled in, the rest are questions.

command.py       runs the script once, and writes the file
found.py         what the facts of the audit say, in an adapter's terms
names.py         which names and options of the script set a field of the recipe
"""
