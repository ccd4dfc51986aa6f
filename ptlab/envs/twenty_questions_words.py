"""The words to guess: common things, animals, places and people's trades that a child knows, one meaning each as far as nouns have one."""

from __future__ import annotations

_ANIMALS = """
ant bear beaver bee butterfly camel cat chicken cow crab crocodile deer dog dolphin donkey duck eagle elephant fly fox frog giraffe goat
goose hamster hedgehog horse kangaroo lion lizard lobster monkey mosquito mouse octopus ostrich owl panda parrot penguin pig pigeon rabbit
rat salmon shark sheep snail snake spider squirrel swan tiger tortoise turkey whale wolf worm zebra
"""
_FOOD = """
almond apple apricot banana bean biscuit bread butter cabbage cake carrot cheese cherry chocolate coconut coffee cucumber egg garlic grape
honey jam lemon lettuce mango melon milk mushroom mustard noodle olive onion orange pancake peach peanut pear pepper pineapple pizza potato
pumpkin raisin rice salad salt sandwich sausage soup spinach strawberry sugar tea tomato vinegar walnut yogurt
"""
_NATURE = """
beach cave cliff cloud desert diamond flower forest glacier grass ice island lake leaf lightning moon mountain mud ocean pebble planet
rain rainbow river rose sand snow star storm sun sunflower swamp tree volcano waterfall wave wind
"""
_HOUSE = """
armchair bath bed blanket bookshelf bottle bowl broom brush bucket candle carpet chair chimney clock cup curtain cushion door drawer fan
fork fridge glass key kettle knife ladder lamp mattress mirror oven pan pillow plate roof scissors shelf shower sink soap sofa sponge spoon
staircase stool table teapot toaster toilet toothbrush towel umbrella vase wall wardrobe window
"""
_CLOTHES = """
belt boot button coat crown dress earring glove hat helmet jacket mitten necklace pocket pyjamas ring sandal scarf shirt shoe skirt sock
sweater tie trousers wallet watch zipper
"""
_TOOLS = """
anchor axe battery calculator camera compass computer drill hammer keyboard lighter magnet microscope nail needle pencil printer radio robot
rope ruler saw screw screwdriver shovel stapler syringe telephone telescope television thermometer torch wheelbarrow wrench
"""
_TRAVEL = """
aeroplane ambulance balloon bicycle boat bus canoe car ferry helicopter lorry motorcycle parachute rocket sailboat scooter ship skateboard
sledge submarine taxi tractor train tram wheelchair
"""
_PLACES = """
airport bakery bank barn bridge castle church cinema factory farm garage garden harbour hospital hotel kitchen library lighthouse market
museum palace park prison restaurant road school stadium supermarket temple tent theatre tower tunnel village zoo
"""
_PLAY = """
ball book card coin dice doll drum flag flute football guitar kite map newspaper painting photograph piano puzzle statue stamp swing
trampoline trumpet violin whistle
"""
_PEOPLE = """
actor astronaut baby baker carpenter chef clown dancer dentist doctor farmer firefighter fisherman judge king lawyer nurse painter pilot
pirate plumber policeman queen sailor scientist singer soldier tailor teacher waiter
"""
_BODY = """
ankle beard blood bone brain ear elbow eye finger foot hair hand heart knee lip lung mouth muscle neck nose shoulder skin stomach thumb toe
tongue tooth
"""

WORDS: tuple[str, ...] = tuple(
    sorted(
        word
        for group in (_ANIMALS, _FOOD, _NATURE, _HOUSE, _CLOTHES, _TOOLS, _TRAVEL, _PLACES, _PLAY, _PEOPLE, _BODY)
        for word in group.split()
    )
)
"""In alphabetical order, each once."""
