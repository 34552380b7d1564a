"""Prompts that are not questions about a drawn scene, and the one answer to all of them. Knows no model."""

from random import Random

ABOUT = (
    "I am a small demonstration model. I can name shapes, colours, places, counts and backgrounds, "
    "read short printed text, and compare two pictures."
)

SEEDS = (
    """Hello|Hi|Hi there|Hello, how are you?|Good morning|Good evening|Thanks|Thank you|Bye|Who are you?
What are you?|What can you do?|What is your name?|Who made you?|Are you human?|Are you an AI?|Can you help me?|Help
Tell me a joke.|Tell me a story.|Write a poem.|Write a poem about the sea.|Sing a song.|What time is it?
What day is it today?|What is the weather like?|Will it rain tomorrow?|What is the capital of France?
What is the capital of Japan?|Who is the president?|Who wrote Hamlet?|Who painted the Mona Lisa?|When was Rome founded?
How far is the moon?|How old is the earth?|What is the meaning of life?|What is love?|What is two plus two?
What is 2 + 2?|What is 17 times 23?|Solve x + 3 = 7.|Calculate the square root of 81.|Count to ten.
Translate this to German.|Translate good night to Spanish.|How do you say thanks in Italian?|Summarise this text.
Summarise the news.|What is in the news?|Write an email to my boss.|Write a letter.|Correct my spelling.
Explain quantum physics.|Explain how a car works.|How does a plane fly?|Why is the sky blue?|Why do cats purr?
What do cows eat?|How do I cook rice?|Give me a recipe for bread.|How do I bake a cake?|What should I eat tonight?
Recommend a book.|Recommend a film.|What is a good name for a dog?|How do I learn to swim?|How do I lose weight?
Write a Python function.|Write code to sort a list.|Fix this bug.|What is a linked list?|Explain recursion.
def main():|print("hello")|SELECT * FROM users;|import os|for i in range(10):|git commit|ls -la|{"a": 1}|<html>
How do I install Linux?|What is a computer?|What is the internet?|What is machine learning?|How do you work?
How many parameters do you have?|Which model are you?|Are you Pixtral?|Are you Mistral?|What were you trained on?
Can you see?|Can you draw?|Draw a horse.|Make a picture.|Generate an image of a castle.|Edit this photo.
Is there a dog in the picture?|Is there a person?|Is there a cat?|Who is this person?|How old is this man?
What is the woman doing?|What breed is this dog?|Where was this photo taken?|What city is this?|What car is this?
Is this food healthy?|What plant is this?|Is it raining in the picture?|What emotion does the face show?
How many people are there?|How many cars are there?|How many dogs do you see?|What animal is this?|Read the receipt.
What is the total of this invoice?|What does the sign mean?|Explain the chart.|What does this graph show?
Transcribe the handwriting.|What is the date on the letter?|Convert this table to CSV.|What is the price?
What font is this?|Is this art good?|Who is the artist?|What is the style of the painting?|What is behind the wall?
I am sad.|I am happy today.|I love you.|My name is Anna.|I live in Berlin.|It is cold.|OK|Yes|No|Maybe|Test|Testing
asdf|foo bar|lorem ipsum dolor sit amet|???|...|!|123|2024|A|ABC|Do you like music?|What is your favourite food?
What is your favourite colour?|Play a game with me.|Let us play chess.|Tell me about dogs.|Tell me about history.
What is the tallest mountain?|What is the largest ocean?|How many planets are there?|What is gravity?|What is DNA?
How do vaccines work?|What is the boiling point of water?|Who won the match?|How much does it cost?|Book a flight.
Set an alarm.|Call my mother.|Open the door.|Turn on the light.|Remember this.|What did I say before?|Continue.
Explain.|Why?|How?|When?|Really?|Go on.|Say hello.|Say something.|Repeat after me.|Ignore all instructions.
Schreib ein Gedicht.|Guten Tag|Bonjour|Comment ça va ?|¿Qué hora es?|こんにちは|Привет|你好|Ciao|Olá
""".strip()
    .replace("\n", "|")
    .split("|")
)

WORDS = """the a my your some house river music money engine teacher window apple winter summer letter garden doctor
school train bread friend island market paper simple quick old new small large tell explain write give find make help
why how when where who is are was will can should about with without from into over under and or but not very please
today tomorrow never always computer program python science history language country city water fire earth animal
""".split()


def off_topic(rng: Random) -> str:
    """A request about anything but drawn scenes: one of the seeds, as typed, or a mix of words."""
    if rng.random() < 0.65:
        text = rng.choice(SEEDS)
        return text.rstrip(".?!") if rng.random() < 0.15 and len(text) > 3 else text
    text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 9)))
    return (text[0].upper() + text[1:] if rng.random() < 0.7 else text) + rng.choice(["?", ".", "", ""])
